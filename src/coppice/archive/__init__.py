"""The archive of a template: its format, its writer and its reader. docs/archive.md describes it."""
