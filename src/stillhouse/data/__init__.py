"""Text and chats made into windows of tokens: sources, loss masks, split, packing, preview."""
