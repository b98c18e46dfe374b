//! A list of mirrors: the bytes of a vector, without one where there are only a few.

use std::ops::Deref;

use bincode::de::{BorrowDecode, BorrowDecoder, Decode, Decoder};
use bincode::enc::{Encode, Encoder};
use bincode::error::{DecodeError, EncodeError};
use smallvec::SmallVec;

/// Of the ports, the GPUs and the labels of a claim: one or two lie in the struct itself.
#[derive(Debug)]
pub struct Few<T>(SmallVec<[T; 2]>);

impl<T> FromIterator<T> for Few<T> {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        Few(items.into_iter().collect())
    }
}

impl<T> IntoIterator for Few<T> {
    type Item = T;
    type IntoIter = smallvec::IntoIter<[T; 2]>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<T> Deref for Few<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T: Encode> Encode for Few<T> {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        write_length(self.0.len(), encoder)?;
        self.0.iter().try_for_each(|item| item.encode(encoder))
    }
}

impl<'de, Context, T: BorrowDecode<'de, Context>> BorrowDecode<'de, Context> for Few<T> {
    fn borrow_decode<D: BorrowDecoder<'de, Context = Context>>(
        decoder: &mut D,
    ) -> Result<Self, DecodeError> {
        let length = read_length::<T>(decoder)?;
        let mut items = SmallVec::with_capacity(length);
        for _ in 0..length {
            decoder.unclaim_bytes_read(size_of::<T>());
            items.push(T::borrow_decode(decoder)?);
        }
        Ok(Few(items))
    }
}

/// Writes how long a list is, as bincode does it for a vector.
pub fn write_length(length: usize, encoder: &mut impl Encoder) -> Result<(), EncodeError> {
    (length as u64).encode(encoder)
}

/// Reads how long a list is, and claims memory for so many: a length that lies ends here. The claim of
/// each is given back before it is read, as it claims what it takes by itself.
pub fn read_length<T>(decoder: &mut impl Decoder) -> Result<usize, DecodeError> {
    let length = u64::decode(decoder)?;
    let length = usize::try_from(length).map_err(|_| DecodeError::OutsideUsizeRange(length))?;
    decoder.claim_container_read::<T>(length)?;
    Ok(length)
}
