"""Text and chats as windows of tokens: sources, loss masks, split, packing, preview."""
