//! Links as they are given on the command line: `A:B=RTT/RATE[/LOSS]`.

use std::str::FromStr;

use thiserror::Error;

use crate::spec::{LabSpec, LinkShape, LinkSpec};

/// One link of the WAN: its two ends, round-trip time (ms), rate (Mbit/s), loss (percent).
#[derive(Debug, Clone, PartialEq)]
pub struct LinkOption(LinkSpec);

/// A text that is no link.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("'{0}' is no link: write A:B=RTT_MS/MBIT[/LOSS_PERCENT], for example aws-east:home=40/200/0.1")]
pub struct LinkError(String);

impl FromStr for LinkOption {
    type Err = LinkError;

    fn from_str(text: &str) -> Result<Self, LinkError> {
        let parse = || {
            let (ends, shape) = text.split_once('=')?;
            let (a, b) = ends.split_once(':')?;
            let mut numbers = shape.split('/');
            let rtt_ms: f64 = numbers.next()?.parse().ok()?;
            let rate_mbit: u32 = numbers.next()?.parse().ok()?;
            let loss: f64 = numbers.next().map_or(Some(0.0), |loss| loss.parse().ok())?;
            if numbers.next().is_some() || !(0.0..=100.0).contains(&loss) {
                return None;
            }
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 <= value <= 1e6")]
            let loss_ppm = (loss * 10_000.0).round() as u32;
            let shape = LinkShape { loss_ppm, ..LinkShape::new(rtt_ms, rate_mbit) };
            Some(Self(LinkSpec { a: a.to_owned(), b: b.to_owned(), shape }))
        };
        parse().ok_or_else(|| LinkError(text.to_owned()))
    }
}

impl LinkOption {
    /// Puts the link into a lab in place of the one between the same ends.
    pub fn apply(&self, spec: &mut LabSpec) {
        let is_same = |link: &LinkSpec| {
            (&link.a, &link.b) == (&self.0.a, &self.0.b) || (&link.a, &link.b) == (&self.0.b, &self.0.a)
        };
        spec.links.retain(|link| !is_same(link));
        spec.links.push(self.0.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_read_and_replace_their_like() {
        let link: LinkOption = "home:aws-east=55.5/100/0.25".parse().unwrap();
        let mut spec = LabSpec::three_clouds("x");
        let count = spec.links.len();
        link.apply(&mut spec);
        assert_eq!(spec.links.len(), count);
        let shape = spec.links.last().unwrap().shape;
        assert_eq!((shape.rtt_ms, shape.rate_mbit, shape.loss_ppm), (55.5, 100, 2500));
        spec.check().unwrap();
        for wrong in ["", "a:b", "a=1/2", "a:b=1", "a:b=x/2", "a:b=1/2/101", "a:b=1/2/3/4"] {
            assert!(wrong.parse::<LinkOption>().is_err(), "{wrong}");
        }
    }
}
