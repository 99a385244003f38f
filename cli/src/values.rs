//! How values of options are read.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use supercloud_api::{OnLoss, Role, Shape};

/// Reads a role by its name in the API; the help lists them.
pub fn roles() -> impl TypedValueParser<Value = Role> {
    PossibleValuesParser::new(["viewer", "policy", "operator", "admin"])
        .try_map(|text| serde_json::from_value::<Role>(serde_json::Value::String(text)))
}

/// What is done for a lost guest.
pub fn on_loss() -> impl TypedValueParser<Value = OnLoss> {
    PossibleValuesParser::new(["nothing", "restart-from-volume"])
        .try_map(|text| serde_json::from_value::<OnLoss>(serde_json::Value::String(text.replace('-', "_"))))
}

/// Reads a shape: vCPUs, `x`, memory in MiB, or with `M` or `G`.
pub fn shape(text: &str) -> Result<Shape, String> {
    let wrong = || format!("'{text}' is no shape: write vCPUs, x and memory, as in 2x1024 (MiB) or 2x4G");
    let (vcpus, memory) = text.split_once('x').ok_or_else(wrong)?;
    let memory_bytes = mebibytes(memory).ok_or_else(wrong)?;
    Ok(Shape { vcpus: vcpus.parse().map_err(|_| wrong())?, memory_bytes })
}

/// Reads a size: a number with `M` (MiB), `G` or `T`.
pub fn size(text: &str) -> Result<u64, String> {
    let is_with_unit = text.ends_with(['M', 'G', 'T']);
    let bytes = mebibytes(text).filter(|_| is_with_unit);
    bytes.ok_or_else(|| format!("'{text}' is no size: write a whole number with M (MiB), G or T, as in 512M or 10G"))
}

/// Whole MiB, or with `M`, `G` or `T`; in bytes.
fn mebibytes(text: &str) -> Option<u64> {
    let units = [('M', 1u64 << 20), ('G', 1 << 30), ('T', 1 << 40)];
    let found = units.iter().find_map(|(letter, unit)| Some((text.strip_suffix(*letter)?, *unit)));
    let (number, unit) = found.unwrap_or((text, 1 << 20));
    // `parse` by itself takes a plus sign.
    let is_plain = number.bytes().all(|byte| byte.is_ascii_digit());
    number.parse::<u64>().ok().filter(|_| is_plain)?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_is_one_word() {
        let good = |vcpus, memory_bytes| Ok(Shape { vcpus, memory_bytes });
        assert_eq!(shape("2x1024"), good(2, 1 << 30));
        assert_eq!(shape("1x512M"), good(1, 512 << 20));
        assert_eq!(shape("16x64G"), good(16, 64 << 30));
        for wrong in ["", "2", "x", "2x", "x4G", "2x4P", "2x-1", "-1x4", "2x99999999999999G", "2 x 4G"] {
            assert!(shape(wrong).is_err(), "{wrong}");
        }
        assert_eq!((size("10G"), size("512M"), size("2T")), (Ok(10 << 30), Ok(512 << 20), Ok(2 << 40)));
        for wrong in ["", "G", "10", "10 G", "1.5G", "+1G", "-1G", "99999999999T"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
