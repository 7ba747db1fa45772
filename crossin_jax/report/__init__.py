"""The report of an evaluation: results on disk, tables, figures and one HTML page."""
