"""Who computes what: devices, rules, costs, the planner and its plans.

Pure functions over frozen data: no Ray, no arrays, no files.
"""
