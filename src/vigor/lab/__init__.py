"""The built-in world: endless tasks, their tokenizer, two tiny base models, and how those were made."""
