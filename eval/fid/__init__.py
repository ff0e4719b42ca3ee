"""FID and its relatives under ADM's protocol: sampling, features, scores, references, report."""
