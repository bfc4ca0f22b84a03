"""How good an attribution is: retrieval, linear datamodeling scores, retraining, baselines."""
