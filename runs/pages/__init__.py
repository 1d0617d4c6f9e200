"""The pages people see: each view checks access, calls services and renders a template."""
