//! Statuses that kubectl shows.
