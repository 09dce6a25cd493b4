"""Measurements of leakjax: records as JSON lines, tables from records."""
