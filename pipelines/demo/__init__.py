"""A page in the browser to draw and to classify with a model: plain functions, and Gradio around them."""
