"""The reference backend: NumPy, operator by operator, weights dequantised to float32.

It is what every other backend is checked against, so it is written to be read.
"""
