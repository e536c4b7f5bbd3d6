"""Initial students: pretrained, randomly initialized, or pruned from the teacher."""
