"""The files, tables, pictures and pages that an experiment writes."""
