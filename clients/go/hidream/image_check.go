package hidream

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"hash"

	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
)

// imageCheck holds the pieces of one image against what was announced: their place, their sum, the
// SHA-256. Its errors wrap ErrBrokenImage.
type imageCheck struct {
	index     int32
	announced *hidreamv1.ImageInfo // nil while nothing has said what the image is to be
	digest    hash.Hash
	size      int64
}

func newImageCheck(index int32) *imageCheck {
	return &imageCheck{index: index, digest: sha256.New()}
}

// Write counts bytes that arrived earlier; only their SHA-256 will tell whether they are right.
func (c *imageCheck) Write(data []byte) (int, error) {
	c.size += int64(len(data))
	return c.digest.Write(data)
}

// isWhole says whether every byte is there.
func (c *imageCheck) isWhole() bool {
	return c.announced != nil && c.size >= c.announced.GetSizeBytes()
}

// add counts the next piece.
func (c *imageCheck) add(chunk *hidreamv1.ImageChunk) error {
	info := chunk.GetImage()
	offset, data := chunk.GetOffset(), chunk.GetData()
	switch {
	case info.GetIndex() != c.index || c.announced != nil && !isSameFile(info, c.announced):
		return c.broken("a piece of another image")
	case c.isWhole():
		return c.broken("a piece after the last one")
	case offset != c.size:
		return c.broken("a piece at byte %d after byte %d", offset, c.size)
	case len(data) == 0:
		// Without end, they would keep a reader for ever.
		return c.broken("an empty piece at byte %d", offset)
	case c.size+int64(len(data)) > info.GetSizeBytes():
		return c.broken("more than its %d bytes", info.GetSizeBytes())
	}
	c.announced = info
	_, err := c.Write(data)
	return err
}

// finish says that no more will come.
func (c *imageCheck) finish() error {
	if !c.isWhole() {
		return c.broken("the stream ended before the image did")
	}
	isRightSize := c.size == c.announced.GetSizeBytes()
	if !isRightSize || !bytes.Equal(c.digest.Sum(nil), c.announced.GetSha256()) {
		return c.broken("the bytes have another SHA-256 than announced")
	}
	return nil
}

func (c *imageCheck) broken(reason string, facts ...any) error {
	return fmt.Errorf("%w: image %d: %s", ErrBrokenImage, c.index, fmt.Sprintf(reason, facts...))
}

// isSameFile says whether both announce the same bytes.
func isSameFile(first, second *hidreamv1.ImageInfo) bool {
	return first.GetSizeBytes() == second.GetSizeBytes() && bytes.Equal(first.GetSha256(), second.GetSha256())
}
