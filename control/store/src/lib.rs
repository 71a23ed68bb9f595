//! Revisioned key-value store with transactions, ranges, watches and compaction, over redb.
