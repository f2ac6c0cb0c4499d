package hidream

import (
	"errors"
	"fmt"

	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
)

// ErrBrokenStream says that what arrived is not what was announced: a piece out of place, a wrong
// SHA-256, an end before the end.
var ErrBrokenStream = errors.New("broken stream")

// ErrBrokenImage says that it is an image that did not arrive as it was announced; what was received of
// it must not be used. It wraps ErrBrokenStream.
var ErrBrokenImage = fmt.Errorf("%w of an image", ErrBrokenStream)

// Image is one finished image; Data is the file, whose SHA-256 was checked.
type Image struct {
	Info *hidreamv1.ImageInfo
	Data []byte
}

// ImageAssembler puts the pieces of the images of one job together, and checks every one of them.
// Its zero value is ready to use.
type ImageAssembler struct {
	checks map[int32]*imageCheck
	data   map[int32][]byte
}

// Add takes the next piece. An error wraps ErrBrokenImage.
func (a *ImageAssembler) Add(chunk *hidreamv1.ImageChunk) error {
	if a.checks == nil {
		a.checks, a.data = map[int32]*imageCheck{}, map[int32][]byte{}
	}
	index := chunk.GetImage().GetIndex()
	check := a.checks[index]
	if check == nil {
		check = newImageCheck(index)
		a.checks[index] = check
	}
	if err := check.add(chunk); err != nil {
		return err
	}
	a.data[index] = append(a.data[index], chunk.GetData()...)
	if check.isWhole() {
		return check.finish()
	}
	return nil
}

// Images returns the images of a job that succeeded, by index. An error wraps ErrBrokenStream:
// ErrBrokenImage where one of them has not arrived whole, or is another one.
func (a *ImageAssembler) Images(job *hidreamv1.Job) ([]Image, error) {
	images := make([]Image, 0, len(job.GetImages()))
	for _, info := range job.GetImages() {
		index := info.GetIndex()
		check := a.checks[index]
		if check == nil {
			check = newImageCheck(index)
		}
		if err := check.finish(); err != nil {
			return nil, err
		}
		if !isSameFile(info, check.announced) {
			return nil, check.broken("it is not the one that the job ended with")
		}
		images = append(images, Image{Info: info, Data: a.data[index]})
	}
	if len(a.checks) != len(images) {
		return nil, fmt.Errorf("%w: %d images have arrived of a job that drew %d",
			ErrBrokenStream, len(a.checks), len(images))
	}
	return images, nil
}

// unfinished is the error of a stream that has ended in the middle of an image; nil where it has not.
func (a *ImageAssembler) unfinished() error {
	for _, check := range a.checks {
		if err := check.finish(); err != nil {
			return err
		}
	}
	return nil
}
