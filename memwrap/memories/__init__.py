"""The memories: one file a method, its config and its module side by side."""
