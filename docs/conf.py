"""Sphinx's settings: the pages of this folder, and one for each public module, read without importing it."""

project = "navil_megatron"
author = "the authors of navil_megatron"
extensions = ["myst_parser", "autoapi.extension", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]
html_theme = "furo"
html_title = project
exclude_patterns = ["study/*.jsonl"]

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 4  # links to headings, as the pages have them

autoapi_dirs = ["../navil_megatron"]
autoapi_root = "api"
autoapi_options = ["members", "show-inheritance", "show-module-summary"]
autoapi_add_toctree_entry = False
autoapi_python_class_content = "both"
autoapi_member_order = "bysource"
# Constants that one line names together (``EMBEDDING, HEAD = ...``) are not among the names that it finds, and
# attributes of records may bear one name in several modules.
suppress_warnings = ["autoapi.python_import_resolution", "ref.python"]
