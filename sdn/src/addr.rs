//! Addresses as guests and views write them: MAC addresses and prefixes, with one text form each.

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Why a text is not an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddrError {
    /// Not six two-digit hexadecimal groups with colons.
    #[error("'{0}' is not a MAC address (want 02:00:00:00:00:01)")]
    Mac(String),
    /// Not `address/length`, or the length is out of range.
    #[error("'{0}' is not a prefix (want address/length)")]
    Prefix(String),
    /// Bits are set to the right of the prefix length.
    #[error("'{0}' has bits set beyond its prefix length")]
    HostBits(String),
}

fn cut(text: &str) -> String {
    text.chars().take(64).collect()
}

/// An Ethernet address. Text form: lower-case hexadecimal with colons.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// The broadcast address.
    pub const BROADCAST: MacAddr = MacAddr([0xff; 6]);

    /// Whether the group bit is set (multicast and broadcast).
    #[must_use]
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 1 == 1
    }

    /// Whether a station may have it: not a group address and not all zero.
    #[must_use]
    pub fn is_station(self) -> bool {
        !self.is_multicast() && self.0 != [0; 6]
    }

    /// The address as a number, most significant byte first.
    #[must_use]
    pub fn to_u128(self) -> u128 {
        self.0.iter().fold(0, |n, b| n << 8 | u128::from(*b))
    }

    /// The IPv6 link-local address with the modified EUI-64 of this MAC (RFC 4291, appendix A).
    #[must_use]
    pub fn link_local(self) -> Ipv6Addr {
        let m = self.0;
        Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, m[0] ^ 2, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]])
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let m = self.0;
        write!(f, "{:02x}:{:02x}:{:02x}:{:02x}:{:02x}:{:02x}", m[0], m[1], m[2], m[3], m[4], m[5])
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = AddrError;

    fn from_str(text: &str) -> Result<Self, AddrError> {
        let bad = || AddrError::Mac(cut(text));
        let mut mac = [0; 6];
        let mut groups = text.split(':');
        for byte in &mut mac {
            let group = groups.next().ok_or_else(bad)?;
            if group.len() != 2 || !group.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(group, 16).map_err(|_| bad())?;
        }
        if groups.next().is_some() { Err(bad()) } else { Ok(Self(mac)) }
    }
}

macro_rules! prefix {
    ($(#[$doc:meta])* $name:ident, $addr:ty, $int:ty, $bits:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name {
            addr: $addr,
            len: u8,
        }

        impl $name {
            /// A prefix. The bits beyond its length must be zero.
            pub fn new(addr: $addr, len: u8) -> Result<Self, AddrError> {
                let made = Self { addr, len: len.min($bits) };
                if len > $bits {
                    return Err(AddrError::Prefix(format!("{addr}/{len}")));
                }
                if <$int>::from(addr) & !made.mask_bits() != 0 {
                    return Err(AddrError::HostBits(format!("{addr}/{len}")));
                }
                Ok(made)
            }

            fn mask_bits(&self) -> $int {
                <$int>::MAX.checked_shl($bits - u32::from(self.len)).unwrap_or(0)
            }

            /// The lowest address.
            #[must_use]
            pub fn network(&self) -> $addr {
                self.addr
            }

            /// The highest address.
            #[must_use]
            pub fn last(&self) -> $addr {
                <$addr>::from(<$int>::from(self.addr) | !self.mask_bits())
            }

            /// The number of leading bits that are fixed.
            #[must_use]
            pub fn prefix_len(&self) -> u8 {
                self.len
            }

            /// The mask as an address.
            #[must_use]
            pub fn netmask(&self) -> $addr {
                <$addr>::from(self.mask_bits())
            }

            /// Whether the address lies in the prefix.
            #[must_use]
            pub fn contains(&self, addr: $addr) -> bool {
                <$int>::from(addr) & self.mask_bits() == <$int>::from(self.addr)
            }

            /// Whether the two prefixes have an address in common.
            #[must_use]
            pub fn overlaps(&self, other: &Self) -> bool {
                self.contains(other.addr) || other.contains(self.addr)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}/{}", self.addr, self.len)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = AddrError;

            fn from_str(text: &str) -> Result<Self, AddrError> {
                let bad = || AddrError::Prefix(cut(text));
                let (addr, len) = text.split_once('/').ok_or_else(bad)?;
                if len.is_empty() || !len.bytes().all(|b| b.is_ascii_digit()) {
                    return Err(bad());
                }
                Self::new(addr.parse().map_err(|_| bad())?, len.parse().map_err(|_| bad())?)
            }
        }

        text_serde!($name);
    };
}

macro_rules! text_serde {
    ($name:ident) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(de::Error::custom)
            }
        }
    };
}

text_serde!(MacAddr);

prefix! {
    /// An IPv4 prefix. Text form: `10.0.0.0/24`; bits beyond the length must be zero.
    Ipv4Prefix, Ipv4Addr, u32, 32
}

prefix! {
    /// An IPv6 prefix. Text form: `fd00::/64`; bits beyond the length must be zero.
    Ipv6Prefix, Ipv6Addr, u128, 128
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_forms_round_trip_and_bad_ones_are_refused() {
        let mac: MacAddr = "02:5C:00:00:00:01".parse().unwrap();
        assert_eq!(mac.to_string(), "02:5c:00:00:00:01");
        for bad in ["", "02:5c:00:00:00", "02:5c:00:00:00:01:02", "2:5c:00:00:00:01", "02:5c:00:00:00:+1"] {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad}");
        }
        let net: Ipv4Prefix = "10.1.0.0/16".parse().unwrap();
        assert_eq!(net.to_string(), "10.1.0.0/16");
        assert!(net.contains("10.1.255.255".parse().unwrap()) && !net.contains("10.2.0.0".parse().unwrap()));
        for bad in ["10.1.0.0", "10.1.0.1/16", "10.1.0.0/33", "10.1.0.0/", "10.1.0.0/+8", "/8"] {
            assert!(bad.parse::<Ipv4Prefix>().is_err(), "{bad}");
        }
        assert_eq!("0.0.0.0/0".parse::<Ipv4Prefix>().unwrap().last(), Ipv4Addr::BROADCAST);
        assert!("fd00::/64".parse::<Ipv6Prefix>().unwrap().contains("fd00::1".parse().unwrap()));
    }

    #[test]
    fn link_local_is_the_modified_eui_64() {
        let mac: MacAddr = "02:00:00:00:00:01".parse().unwrap();
        assert_eq!(mac.link_local(), "fe80::ff:fe00:1".parse::<Ipv6Addr>().unwrap());
    }
}
