"""The pages: each takes what was asked for and says which template is drawn with what. None imports a web framework."""
