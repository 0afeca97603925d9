"""Finetuning: coders trained on the model's own loss, from where `bsc train` left them."""
