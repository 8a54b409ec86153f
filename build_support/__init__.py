"""How fastsgd is built; no part of the installed package."""
