"""What pictures look like to pretrained networks: preprocessing, embeddings and perceptual distances."""
