//! One-shot tokens: the secret in a streaming URL, good for one connection and one minute.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a token waits for its connection.
pub const LIFE: Duration = Duration::from_secs(60);

/// Tokens that may wait at once.
pub const MAX_WAITING: usize = 1000;

/// No token could be given.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Too many wait for their connection.
    #[error("{MAX_WAITING} streaming requests are waiting for their connection already")]
    Full,
    /// The kernel gave no randomness.
    #[error("no randomness for a token")]
    Random(#[from] getrandom::Error),
}

/// Requests that wait for their connection.
pub struct Tokens<T>(Mutex<HashMap<String, (Instant, T)>>);

impl<T> Default for Tokens<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Tokens<T> {
    /// Keeps `request` and gives the token that gets it back.
    pub fn insert(&self, request: T) -> Result<String, TokenError> {
        self.insert_at(request, Instant::now())
    }

    /// Takes the request of a token, which is worth nothing afterwards.
    pub fn take(&self, token: &str) -> Option<T> {
        self.take_at(token, Instant::now())
    }

    fn insert_at(&self, request: T, now: Instant) -> Result<String, TokenError> {
        let mut random = [0; 16];
        getrandom::fill(&mut random)?;
        let token = format!("{:032x}", u128::from_be_bytes(random));
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|_, (since, _)| now.duration_since(*since) < LIFE);
        if waiting.len() >= MAX_WAITING {
            return Err(TokenError::Full);
        }
        waiting.insert(token.clone(), (now, request));
        Ok(token)
    }

    fn take_at(&self, token: &str, now: Instant) -> Option<T> {
        let (since, request) = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(token)?;
        (now.duration_since(since) < LIFE).then_some(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_works_once() {
        let tokens = Tokens::default();
        let token = tokens.insert(7).expect("token");
        assert_eq!(tokens.take(&token), Some(7));
        assert_eq!(tokens.take(&token), None);
        assert_eq!(tokens.take("guess"), None);
    }

    #[test]
    fn old_tokens_are_worth_nothing_and_make_room() {
        let tokens = Tokens::default();
        let begun = Instant::now();
        let token = tokens.insert_at(0, begun).expect("token");
        for number in 1..MAX_WAITING {
            tokens.insert_at(number, begun).expect("token");
        }
        assert!(matches!(tokens.insert_at(0, begun), Err(TokenError::Full)));
        assert_eq!(tokens.take_at(&token, begun + LIFE), None);
        assert!(tokens.insert_at(0, begun + LIFE).is_ok());
    }
}
