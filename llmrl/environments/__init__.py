"""Episodes of several turns: environments, tools, and the text between turns."""
