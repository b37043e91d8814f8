//! CRC32C, by which values and headers are compared: the CRC-32/ISCSI of the catalogues.

use crc_fast::{CrcAlgorithm, Digest};

/// Of these bytes.
#[must_use]
pub fn crc32c(data: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(data)
}

/// Of bytes that come one part after the other.
pub(crate) struct Crc32c(Digest);

impl Crc32c {
    pub(crate) fn new() -> Self {
        Crc32c(Digest::new(CrcAlgorithm::Crc32Iscsi))
    }

    pub(crate) fn update(&mut self, part: &[u8]) {
        self.0.update(part);
    }

    pub(crate) fn finish(self) -> u32 {
        self.0.finalize() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One bit after the other, as RFC 3720 defines it.
    fn by_definition(data: &[u8]) -> u32 {
        let mut register = !0u32;
        for byte in data {
            register ^= u32::from(*byte);
            for _ in 0..8 {
                let carry = register & 1;
                register = (register >> 1) ^ (carry * 0x82f6_3b78);
            }
        }
        !register
    }

    #[test]
    fn it_is_that_of_the_standard() {
        // RFC 3720, B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(b""), 0);
    }

    /// What is computed by wide instructions depends on the length and on where the bytes begin.
    #[test]
    fn it_is_the_same_by_any_way_of_any_length() {
        let data: Vec<u8> = (0..5000u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        for start in [0, 1, 3, 8, 15] {
            for length in (0..600).chain([1023, 1024, 1025, 4095, 4096, 4900]) {
                let part = &data[start..start + length];
                let expected = by_definition(part);
                assert_eq!(crc32c(part), expected, "{length} bytes from {start} on");
                let mut parts = Crc32c::new();
                part.chunks(97).for_each(|part| parts.update(part));
                assert_eq!(
                    parts.finish(),
                    expected,
                    "{length} bytes from {start} on, in parts"
                );
            }
        }
    }
}
