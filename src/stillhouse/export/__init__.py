"""The exported model in its formats, each checked by loading it as its users would."""
