"""The model to ship, in the formats asked for, each checked by loading it as a stranger would."""
