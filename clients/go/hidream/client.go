// Package hidream is a small client of a hidream-grpc server, on the generated stubs in v1.
package hidream

import (
	"context"
	"errors"
	"fmt"
	"io"

	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
)

// Generate draws images and follows the job to its end. It calls onEvent, which may be nil, with
// every event but the pieces of images, which it puts together and checks.
//
// Cancelling ctx cancels the job at its next step, unless request.Detached is set; the deadline of
// ctx is the job's. A refused request or a failed job is a gRPC status error, with the details that
// image_gen.proto lists; images that did not arrive as they were sent wrap ErrBrokenStream.
func Generate(
	ctx context.Context,
	client hidreamv1.ImageGenClient,
	request *hidreamv1.GenerateRequest,
	onEvent func(*hidreamv1.JobEvent),
) ([]Image, error) {
	// Leaving early must end the call, or it would live as long as the caller's context.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.Generate(ctx, request)
	if err != nil {
		return nil, err
	}
	var assembler ImageAssembler
	var job *hidreamv1.Job
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		event := response.GetEvent()
		if chunk := event.GetImageChunk(); chunk != nil {
			if err := assembler.Add(chunk); err != nil {
				return nil, err
			}
			continue
		}
		if succeeded := event.GetSucceeded(); succeeded != nil {
			job = succeeded.GetJob()
		}
		if onEvent != nil {
			onEvent(event)
		}
	}
	if job == nil {
		return nil, fmt.Errorf("%w: it ended before the job did", ErrBrokenStream)
	}
	return assembler.Images(job)
}
