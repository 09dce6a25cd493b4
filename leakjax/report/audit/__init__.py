"""The record of an audit, its table and its page."""
