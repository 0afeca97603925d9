"""The report: one static page, made of figures and a template."""
