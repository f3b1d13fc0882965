"""A plan as a page: one self-contained HTML file with a drawing, for people to look at and show."""

from raygraft.picture.page import plan_page

__all__ = ["plan_page"]
