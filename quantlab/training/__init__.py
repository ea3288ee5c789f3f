"""Training: data forms and the set-up of transformers' trainers (pretrain today)."""
