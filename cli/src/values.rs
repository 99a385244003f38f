//! How values of options are read.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use supercloud_api::{Role, Shape};

/// Reads a role by its name in the API; the help lists them.
pub fn roles() -> impl TypedValueParser<Value = Role> {
    PossibleValuesParser::new(["viewer", "policy", "operator", "admin"])
        .try_map(|text| serde_json::from_value::<Role>(serde_json::Value::String(text)))
}

/// Reads a shape: vCPUs, `x`, memory in MiB, or with `M` or `G`.
pub fn shape(text: &str) -> Result<Shape, String> {
    let wrong = || format!("'{text}' is no shape: write vCPUs, x and memory, as in 2x1024 (MiB) or 2x4G");
    let (vcpus, memory) = text.split_once('x').ok_or_else(wrong)?;
    let (number, unit) = match memory.strip_suffix('G') {
        Some(number) => (number, 1u64 << 30),
        None => (memory.strip_suffix('M').unwrap_or(memory), 1 << 20),
    };
    let number = number.parse::<u64>().map_err(|_| wrong())?;
    let memory_bytes = number.checked_mul(unit).ok_or_else(wrong)?;
    Ok(Shape { vcpus: vcpus.parse().map_err(|_| wrong())?, memory_bytes })
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
        for wrong in ["", "2", "x", "2x", "x4G", "2x4T", "2x-1", "-1x4", "2x99999999999999G", "2 x 4G"] {
            assert!(shape(wrong).is_err(), "{wrong}");
        }
    }
}
