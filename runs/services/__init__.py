"""The only writers of rows and events. Views, recipes and workers call these; they call models."""
