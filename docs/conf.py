"""The site: pages in Markdown, one page per quantity out of a table, the docstrings, and a gallery that runs at build time."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the gallery's networks are small: a second thread only gets in the way

import curvfunc

project = "curvfunc"
author = "The curvfunc developers"
copyright = "the curvfunc developers, MIT license"
release = version = curvfunc.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "mathml",
    "drawings",
    "names",
    "quantity_pages",
]
exclude_patterns = ["_build", "gallery/**"]
nitpicky = True
html_math_renderer = "mathml"

# -- pages
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]

# -- docstrings
default_role = "py:obj"
add_module_names = False
autodoc_typehints = "none"  # each argument is described, and types of the signature are long
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 100

# -- the gallery
GALLERY = Path(__file__).parent / "gallery"
sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "filename_pattern": os.environ.get("GALLERY", r"/plot_"),  # a pattern of those that run
    "within_subsection_order": "gallery_look.InOrder",
    "reset_modules": ("matplotlib", "gallery_look.reset"),
    "reset_modules_order": "both",
    "backreferences_dir": "auto_gallery/uses",
    "doc_module": ("curvfunc",),
    "inspect_global_variables": False,
    "reference_url": {"curvfunc": None},
    "abort_on_example_error": True,
    "plot_gallery": True,
    "capture_repr": (),  # the picture is what a script ends in
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "image_srcset": ["2x"],
    "min_reported_time": 1,
    "thumbnail_size": (600, 252),
}

# -- how it looks
html_theme = "furo"
html_title = "curvfunc"
html_static_path = ["_static"]
html_css_files = ["curvfunc.css"]
html_show_sphinx = False
html_copy_source = False
BRAND = ("color-brand-primary", "color-brand-content", "color-brand-visited")
html_theme_options = {
    "light_css_variables": dict.fromkeys(BRAND, "#0b5c8a"),
    "dark_css_variables": dict.fromkeys(BRAND, "#7cc4ec"),
}
pygments_style = "friendly"
pygments_dark_style = "nord"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
