"""Commands: options in, one call, tables out. Nothing heavy is imported before a command runs."""
