"""From a batch of images to what the queries predict: backbone, encoder, queries, decoder, boxes."""
