//! Numbers and pieces out of bytes.

/// What is wrong, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) at: usize,
    pub(super) what: &'static str,
}

/// A place in bytes that somebody else wrote.
#[derive(Debug, Clone)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Where these bytes begin in the file.
    base: usize,
}

impl<'a> Cursor<'a> {
    /// The beginning of bytes that lie at `base` in their file.
    pub(super) const fn new(bytes: &'a [u8], base: usize) -> Self {
        Self { bytes, at: 0, base }
    }

    /// A fault here.
    pub(super) const fn fault(&self, what: &'static str) -> Fault {
        Fault {
            at: self.base + self.at,
            what,
        }
    }

    pub(super) const fn is_at_end(&self) -> bool {
        self.at >= self.bytes.len()
    }

    /// Where in the file this is.
    pub(super) const fn place(&self) -> usize {
        self.base + self.at
    }

    /// The next bytes. Nothing is allocated for a length that is a lie.
    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8], Fault> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else {
            return Err(self.fault("unexpected end of file"));
        };
        let piece = &self.bytes[self.at..end];
        self.at = end;
        Ok(piece)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(super) fn byte(&mut self) -> Result<u8, Fault> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// A number of four bytes, the highest first.
    pub(super) fn int32(&mut self) -> Result<i32, Fault> {
        self.array().map(i32::from_be_bytes)
    }

    /// A number of eight bytes, the highest first.
    pub(super) fn int64(&mut self) -> Result<i64, Fault> {
        self.array().map(i64::from_be_bytes)
    }

    /// A length of four bytes, and as many bytes.
    pub(super) fn piece(&mut self) -> Result<&'a [u8], Fault> {
        let len = usize::try_from(self.int32()?).map_err(|_| self.fault("negative length"))?;
        self.take(len)
    }

    /// Groups of seven bits, the lowest first.
    fn varint(&mut self, bits: u32) -> Result<u64, Fault> {
        let mut number = 0;
        let mut shift = 0;
        loop {
            let byte = self.byte()?;
            let group = u64::from(byte & 0x7f);
            if shift >= bits || group.checked_shr(bits - shift).unwrap_or(0) != 0 {
                return Err(self.fault("number too large"));
            }
            number |= group << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
            shift += 7;
        }
    }

    pub(super) fn varint32(&mut self) -> Result<i32, Fault> {
        // Cannot fail: no more than 32 bits.
        let number = u32::try_from(self.varint(32)?).unwrap_or_default();
        Ok(number.cast_signed())
    }

    pub(super) fn varint64(&mut self) -> Result<i64, Fault> {
        self.varint(64).map(u64::cast_signed)
    }

    /// How many things follow, each of `least` bytes or more.
    pub(super) fn count(&mut self, least: usize) -> Result<usize, Fault> {
        let count = usize::try_from(self.varint32()?).map_err(|_| self.fault("negative count"))?;
        if count.saturating_mul(least) > self.bytes.len() - self.at {
            return Err(self.fault("count exceeds the bytes that are left"));
        }
        Ok(count)
    }

    pub(super) fn flag(&mut self) -> Result<bool, Fault> {
        match self.varint32()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.fault("flag is neither 0 nor 1")),
        }
    }

    /// A length in groups of bits, and as many bytes.
    pub(super) fn blob(&mut self) -> Result<&'a [u8], Fault> {
        let len = self.count(1)?;
        self.take(len)
    }
}
