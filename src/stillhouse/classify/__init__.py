"""One job for a small model: a teacher's judgment of texts, distilled into a classifier."""
