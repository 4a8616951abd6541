"""What concerns exports and models of others: adapters, exports made again, one model against another."""
