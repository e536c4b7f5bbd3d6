"""Initial students: pretrained, random, or pruned from the teacher."""
