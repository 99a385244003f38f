//! How much of a thing that all use one token may have at once.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use supercloud_api::{Token, ids::TokenId};

/// Counts by token. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Shares(Arc<Mutex<HashMap<TokenId, usize>>>);

/// One place of a token's; given back when dropped.
#[derive(Debug)]
pub struct Share {
    shares: Shares,
    token: TokenId,
}

impl Shares {
    /// A place, if the token has fewer than `most`; a guest-scoped one has an eighth of that.
    #[must_use]
    pub fn take(&self, token: &Token, most: usize) -> Option<Share> {
        let most = if token.guest.is_some() { (most / 8).max(1) } else { most };
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(token.id).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Share { shares: self.clone(), token: token.id })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut counts = self.shares.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.token) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.token);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use supercloud_api::{Role, ids::GuestId};

    use super::*;

    fn token(guest: bool) -> Token {
        Token {
            id: TokenId::generate(),
            name: "t".parse().unwrap(),
            project: None,
            guest: guest.then(GuestId::generate),
            role: Role::Operator,
            expires_at_ms: None,
            created_at_ms: 0,
        }
    }

    #[test]
    fn nobody_takes_the_places_of_others_and_what_is_given_back_is_there_again() {
        let shares = Shares::default();
        let (one, other, guest) = (token(false), token(false), token(true));
        let held: Vec<Share> = (0..16).map(|_| shares.take(&one, 16).unwrap()).collect();
        assert!(shares.take(&one, 16).is_none());
        assert!(shares.take(&other, 16).is_some());
        let own: Vec<Share> = (0..2).map(|_| shares.take(&guest, 16).unwrap()).collect();
        assert!(shares.take(&guest, 16).is_none());
        drop((held, own));
        assert!(shares.take(&one, 16).is_some());
        assert!(shares.0.lock().unwrap().is_empty(), "nothing is kept of tokens that ask for nothing");
    }
}
