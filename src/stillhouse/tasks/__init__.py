"""What tasks of every kind share: their texts, their teacher, and the facts about both."""
