//! How much of a thing that all use one token, or one address, may have at once.

use std::{
    collections::HashMap,
    fmt,
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
};

use supercloud_api::{Token, ids::TokenId};

/// Who shares.
pub trait Sharer: Eq + Hash + Clone + fmt::Debug {}

impl<T: Eq + Hash + Clone + fmt::Debug> Sharer for T {}

/// Counts by who has something. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Shares<S: Sharer = TokenId>(Arc<Mutex<HashMap<S, usize>>>);

/// One place of somebody's; given back when dropped.
#[derive(Debug)]
pub struct Share<S: Sharer = TokenId> {
    shares: Shares<S>,
    of: S,
}

impl<S: Sharer> Default for Shares<S> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<S: Sharer> Shares<S> {
    /// A place, if this one has fewer than `most`.
    #[must_use]
    pub fn take_as(&self, of: S, most: usize) -> Option<Share<S>> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(of.clone()).or_default();
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(Share { shares: Shares(Arc::clone(&self.0)), of })
    }
}

impl Shares {
    /// A place, if the token has fewer than `most`; a guest-scoped one has an eighth of that.
    #[must_use]
    pub fn take(&self, token: &Token, most: usize) -> Option<Share> {
        let most = if token.guest.is_some() { (most / 8).max(1) } else { most };
        self.take_as(token.id, most)
    }
}

impl<S: Sharer> Drop for Share<S> {
    fn drop(&mut self) {
        let mut counts = self.shares.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.of) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.of);
            }
        }
    }
}

/// Who an address is: whoever has one of IPv6 has all that its first 64 bits name.
#[must_use]
pub fn neighbourhood(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        address => address,
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
        let shares: Shares = Shares::default();
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

    #[test]
    fn an_address_is_as_much_as_one_machine_can_have_of_them() {
        let of = |text: &str| neighbourhood(text.parse().unwrap());
        assert_eq!(of("2001:db8:1:2::3"), of("2001:db8:1:2:ffff::9"));
        assert_ne!(of("2001:db8:1:2::3"), of("2001:db8:1:3::3"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.2"), of("192.0.2.1"));
    }
}
