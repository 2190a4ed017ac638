"""The commands, grouped by what they are about; evalkit.cli puts them together."""
