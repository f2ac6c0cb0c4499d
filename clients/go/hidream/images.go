package hidream

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"

	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
)

// ErrBrokenStream says that what arrived is not what was announced: a piece out of place, a wrong
// SHA-256, an end before the end.
var ErrBrokenStream = errors.New("broken stream")

// Image is one finished image; Data is the file, whose SHA-256 was checked.
type Image struct {
	Info *hidreamv1.ImageInfo
	Data []byte
}

// ImageAssembler puts the pieces of the images of one job together, and checks every one of them.
// Its zero value is ready to use.
type ImageAssembler struct {
	unfinished map[int32][]byte
	finished   map[int32]Image
}

// Add takes the next piece. An error wraps ErrBrokenStream.
func (a *ImageAssembler) Add(chunk *hidreamv1.ImageChunk) error {
	if a.finished == nil {
		a.unfinished, a.finished = map[int32][]byte{}, map[int32]Image{}
	}
	info := chunk.GetImage()
	index := info.GetIndex()
	if _, isFinished := a.finished[index]; isFinished {
		return fmt.Errorf("%w: image %d: a piece after the last one", ErrBrokenStream, index)
	}
	data := a.unfinished[index]
	if chunk.GetOffset() != int64(len(data)) {
		return fmt.Errorf("%w: image %d: a piece at byte %d after byte %d",
			ErrBrokenStream, index, chunk.GetOffset(), len(data))
	}
	data = append(data, chunk.GetData()...)
	if int64(len(data)) > info.GetSizeBytes() {
		return fmt.Errorf("%w: image %d: more than its %d bytes", ErrBrokenStream, index, info.GetSizeBytes())
	}
	a.unfinished[index] = data
	if int64(len(data)) < info.GetSizeBytes() {
		return nil
	}
	delete(a.unfinished, index)
	if digest := sha256.Sum256(data); !bytes.Equal(digest[:], info.GetSha256()) {
		return fmt.Errorf("%w: image %d: the bytes have another SHA-256 than announced", ErrBrokenStream, index)
	}
	a.finished[index] = Image{Info: info, Data: data}
	return nil
}

// Images returns the images of a job that succeeded, by index. An error wraps ErrBrokenStream: one
// of them has not arrived whole.
func (a *ImageAssembler) Images(job *hidreamv1.Job) ([]Image, error) {
	images := make([]Image, 0, len(job.GetImages()))
	for _, info := range job.GetImages() {
		image, isFinished := a.finished[info.GetIndex()]
		if !isFinished {
			return nil, fmt.Errorf("%w: image %d has not arrived whole", ErrBrokenStream, info.GetIndex())
		}
		images = append(images, image)
	}
	return images, nil
}
