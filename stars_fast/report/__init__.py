"""What measurements share: figures by matplotlib of the extra ``report``, files, and the weights of models."""
