"""Students as they start: pretrained, random, or pruned from the teacher."""
