"""How Sphinx makes a site of these pages: ``sphinx-build -W -n docs build/docs``."""

import fastsgd

project = "fastsgd"
author = project_copyright = "The fastsgd authors"
release = fastsgd.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
myst_heading_anchors = 3  # as GitHub makes them: one link serves both
highlight_language = "text"  # of indented blocks, which do not say what they hold

autodoc_default_options = {
    "members": True,
    "inherited-members": "Optimizer",  # up to that class, whose methods are torch's own
    "member-order": "groupwise",
}
autodoc_typehints = "none"  # the text says them, and torch's are long
napoleon_custom_sections = ["State"]
napoleon_use_ivar = True  # the properties have entries of their own

nitpick_ignore_regex = [
    ("py:.*", r"torch\..*"),  # torch's inventory is on the network, and a build needs none
    ("py:class", "Callable|optional"),  # how torch's docstrings write types
]
