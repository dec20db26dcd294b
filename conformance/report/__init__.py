"""One run, one `schema.Report`; the other files only show or store it. Needs pydantic, which each backend extra brings."""
